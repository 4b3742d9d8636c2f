"""The plug-in for vLLM: mixtures of experts as an out-of-tree model. Needs a GPU and has not been run on one yet."""
