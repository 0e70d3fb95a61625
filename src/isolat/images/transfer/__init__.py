"""Images to and from elsewhere: registries (through skopeo, confined), archives, root file systems.

::

    pulling.py    a registry's image into the store     pushing.py   and back
    archives.py   an archive into the store             saving.py    and back
    importing.py  a root file system as an image
    skopeo.py     how skopeo is run; proxy.py: as a server of blobs
    unpack.py     how an archive is read
    policy.py     which images are accepted             staging.py   what was fetched before a pull was killed
    flights.py    one transfer for all who want the same
"""
