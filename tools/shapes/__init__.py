"""A data set of drawn shapes."""
