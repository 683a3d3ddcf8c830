"""Prints the path of the folder, which is written on first use."""

from examples.digits import folder

print(folder())
