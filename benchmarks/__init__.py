"Measurements of paramfx; see README.md in this folder."
