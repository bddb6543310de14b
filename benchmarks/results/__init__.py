"""The project's own results on real questions: what is run, in which order, and what came out."""
