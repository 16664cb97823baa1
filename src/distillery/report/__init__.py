"""The report: sentences, figures, the page, and model cards."""
