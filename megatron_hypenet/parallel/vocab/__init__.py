"""What the vocabulary losses are made of: terms of one chunk of logits in torch and in Triton, and
sums of the head's gradients."""
