"""Networks in ONNX files, as PyTorch modules: reading a file, converting its operators, and comparing the results."""
