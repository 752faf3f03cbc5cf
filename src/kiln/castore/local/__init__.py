"""The store on local disk: blobs and trees as files, directories and results in SQLite."""
