"""What every room of the package uses: words, threads, filters, lookups and entries of records."""
