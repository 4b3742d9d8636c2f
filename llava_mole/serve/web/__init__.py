"""The web page: a conversation with one or several models, and what their routers do."""
