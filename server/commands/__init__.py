"""The commands of `ficoco-vllm`, one file each."""
