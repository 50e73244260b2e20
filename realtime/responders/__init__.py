"""Who answers: the interface of a responder, and those that the package ships."""
