"""Exported folders in inference engines, a package per engine. An engine is imported by that
package alone, and only when the engine asks for it."""
