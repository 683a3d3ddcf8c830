"""Data: from files to batches.

source.py        what a data set is (`Source.read(i) -> Example`), and the rules all share
folder.py webdataset.py tfds_source.py shards.py     the sources
sources.py       the source that a config or a command names (`parse`, `make_source`)
decode.py        the decoder; reader.py the reader, by threads (`read_ahead`)
transforms.py    crops and augmentations
pipeline.py      the batch of a step (`make_pipeline`)
records.py       what models made of images, as bytes
check.py         what `flextok data check` says of a data set
"""
