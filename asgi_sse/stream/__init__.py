"""One response, from source to socket, and the registry of all running responses."""
