"""Training: phases of gradient descent on stored teacher outputs, resumable to the bit."""
