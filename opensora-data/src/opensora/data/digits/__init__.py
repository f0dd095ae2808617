"""Moving digits: a small captioned video dataset of real handwriting, and the grader that reads it back from pixels."""
