"""Prints the path of the folder, which is written on first use."""

from examples.photos import folder

print(folder())
