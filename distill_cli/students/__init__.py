"""Students: friendly names (`aliases`), the model a recipe describes (`build`), weights on disk (`weights`)."""
