"""What makes INT8 agree with the float model without training, and what says where it does not."""
