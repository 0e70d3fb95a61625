"""What can be said about the layers on this machine, because it was tried or measured here."""
