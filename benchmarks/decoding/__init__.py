"""Host time of a decoding step, stock model runner V2 and ours."""
