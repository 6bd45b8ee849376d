"""Scattering coefficients of molecules: features of whole graphs."""
