"""Data: from files to batches.

source.py        what a data set is (`Source.read(i) -> Example`), and the rules all share:
                 names of splits, labels, captions, embeddings, what was passed over
folder.py webdataset.py tfds_source.py shards.py     the sources
sources.py       the source that a config or a command names (`parse`, `make_source`)
decode.py        the one decoder; reader.py the one reader, by threads (`read_ahead`)
transforms.py    crops and augmentations
pipeline.py      the batch of a step (`make_pipeline`)
records.py encoded.py     what models made of images, as bytes and in batches
check.py         what `flextok data check` says of a data set

source = make_source(parse("FOLDER"), "validation")
for found in read_ahead(source, range(len(source)), lambda p: (p.key, p.image.size)):
    ...  # an `Unreadable(key, reason)` where the file is broken
"""
