/** The names of our commands. Each is also in the palette. */
export const CommandIDs = {
  openPanel: 'tuft:open-panel',
  openRuns: 'tuft:open-runs',
  openPlayground: 'tuft:open-playground',
  uploadAdapter: 'tuft:upload-adapter',
  exportMetrics: 'tuft:export-metrics',
  closeRun: 'tuft:close-run',
  insertStart: 'tuft:insert-start',
  insertResume: 'tuft:insert-resume',
  insertCheckpoint: 'tuft:insert-checkpoint',
  copyCheckpoint: 'tuft:copy-checkpoint-path',
  downloadCheckpoint: 'tuft:download-checkpoint',
  keepCheckpoint: 'tuft:keep-checkpoint',
  expireCheckpoint: 'tuft:expire-checkpoint',
  publishCheckpoint: 'tuft:publish-checkpoint',
  unpublishCheckpoint: 'tuft:unpublish-checkpoint',
  deleteCheckpoint: 'tuft:delete-checkpoint'
} as const;
