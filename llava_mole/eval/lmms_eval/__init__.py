"""The plug-in for lmms-eval, and its tasks."""
