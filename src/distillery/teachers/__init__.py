"""Teachers: models that give label probabilities, rationales and paraphrases."""
