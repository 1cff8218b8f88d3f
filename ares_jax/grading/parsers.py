"""Builds the parsers of formulas when it is imported, which takes as long as twenty formulas."""

from ares_jax.grading.formula import same_formula

same_formula("\\frac{x}{2}+1", "1+\\frac{x}{2}")
