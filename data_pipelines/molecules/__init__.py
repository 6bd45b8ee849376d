"""Molecules of one's own: files in the formats of the field, read row by row."""
