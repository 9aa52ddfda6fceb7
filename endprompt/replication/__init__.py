"""Comparing methods ("arms") under one engine, budget and evaluation."""
