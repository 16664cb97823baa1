"""Training: phases of gradient descent on kept teacher outputs, resumable to the bit."""
