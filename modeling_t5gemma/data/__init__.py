"""Records: read from files and the Hub, the bad ones counted and named."""
