"""Published question sets: a reader for each, where they are found, the folder they become."""
