"""Recipe: a convolutional network with five exits that reads a word's stress pattern off its spelling."""
