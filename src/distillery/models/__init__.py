"""Models: fetched, loaded, cut to the wanted layers, asked for label probabilities, saved."""
