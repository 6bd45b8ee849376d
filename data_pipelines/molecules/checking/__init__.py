"""What is in a file of molecules, and what is wrong with it."""
