"""Noto Color Emoji: pictures of 64x64 pixels with groups and names, from an npm package."""
