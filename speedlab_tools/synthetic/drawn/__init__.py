"""A model that draws: the world that it knows, the examiner that reads its pictures, and its weights as factors."""
