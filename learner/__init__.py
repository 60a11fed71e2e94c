"""The learner: from votes to a better adapter, in a process of its own. Imports `engine` and `store`, never `server`."""
