"""ONNX: a pruned model as a graph, the folder it lies in, its quantised forms, and running it."""
