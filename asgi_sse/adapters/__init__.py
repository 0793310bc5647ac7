"""Responses that frameworks take for their own, one room for each; each imports its framework alone."""
