"""Pictures of shapes, classified by clients who each see some shapes more often than others."""
