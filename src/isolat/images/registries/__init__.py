"""Images to and from registries, through skopeo, confined.

::

    pulling.py   a registry's image into the store          pushing.py   and back
    skopeo.py    how skopeo is run, and what its errors mean
    proxy.py     skopeo as a server of one image's blobs    copying.py   skopeo under a policy that asks for signatures
    policy.py    which images are accepted
    staging.py   what was fetched, also before a pull was killed
    flights.py   one transfer for all who want the same
    watch.py     when a transfer has to end before its end
"""
