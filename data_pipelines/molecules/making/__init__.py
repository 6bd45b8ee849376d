"""From a row of a file to a molecule: chemistry, geometry, and who is who."""
