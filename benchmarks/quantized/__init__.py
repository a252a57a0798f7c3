"""What quantized weights and fewer visual tokens save together."""
