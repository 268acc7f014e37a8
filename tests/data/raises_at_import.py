raise RuntimeError("the library it needs is missing")
