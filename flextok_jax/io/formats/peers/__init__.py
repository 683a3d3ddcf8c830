"""Released tokenizers of other projects, as ours. Each file reads those of one project.

docs/peers.md says which files these are. A reader has `find(path)`: the file it reads in a folder,
or None; and `load(path)`: (configuration, parameters) of that file.
"""

from flextok_jax.io.formats.peers import convs, elastictok, titok

_READERS = (titok, convs, elastictok)
FILES = (elastictok.FILE,)  # What they need of a hub id, beside model.safetensors and config.json.


def find(path):
    """(the file, the function that reads it) of a folder or a file of weights; else None."""
    for reader in _READERS:
        if (file := reader.find(path)) is not None:
            return file, reader.load
    return None
