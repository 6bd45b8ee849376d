"""How the weights and arrays of official implementations map to our models: one file a system.

Each module has `SYSTEMS`: stem of a golden file -> `System`.
"""
