"""What a finished run is for: recommending, scoring, vectors for others, an index, a server."""
