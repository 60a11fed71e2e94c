"""The bundled starter model: its corpus, its recipe and its weights (`assistant/`). Nothing here serves or learns from votes."""
