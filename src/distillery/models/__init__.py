"""Models: fetched, loaded, cut to the wanted layers, run on texts, and saved."""
