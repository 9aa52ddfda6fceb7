"""Real inputs from package registries: a small model and public-domain text. Nothing here is needed for own data."""
