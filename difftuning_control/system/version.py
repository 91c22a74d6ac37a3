"""The version of this package, which a checkout that is not installed has too."""

VERSION = "0.1.0"
